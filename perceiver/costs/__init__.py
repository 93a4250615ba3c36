"""What a training step costs: FLOPs, activations, memory, traffic, and the devices that pay for it."""
