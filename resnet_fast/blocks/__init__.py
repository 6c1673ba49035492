"""Modules whose forward is one op call, and which stay what they were: torchvision's or timm's blocks.

Each class here derives from a stock class and adds no state; :func:`resnet_fast.accelerate` exchanges ``__class__``, so
children, parameters, hooks and ``state_dict`` are untouched. A block reads its children's attributes at every call, and
where they are anything but the plain layers that the op computes, it runs the stock forward and says why.
"""
