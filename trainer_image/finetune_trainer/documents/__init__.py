"""What people read beside the weights: model card with loss plot, and `resolved.yaml`, everything that made them."""
