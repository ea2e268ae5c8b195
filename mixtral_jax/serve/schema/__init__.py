"""What requests and answers look like: strict models, one module for each API."""
