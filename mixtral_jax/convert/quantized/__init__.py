"""Published quantized checkpoints: how each method lays a matrix out, decoded into QTensors."""
