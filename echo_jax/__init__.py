"""ECHO on JAX: policy gradient on action tokens plus next-token cross-entropy on tool output, in one forward pass."""
