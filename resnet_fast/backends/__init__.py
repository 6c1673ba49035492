"""Implement the ops. Each backend is a folder; ``resnet_fast.flags.BACKENDS`` lists them."""
