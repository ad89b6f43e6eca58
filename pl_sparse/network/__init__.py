"""What is seen of a network: gradients, heads, joined channels, multiply-accumulates, latency."""
