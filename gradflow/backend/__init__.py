"""What gradflow asks of JAX and of the machine."""
