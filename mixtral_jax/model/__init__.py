"""The maths of Mixtral, readable without knowing any mesh."""
