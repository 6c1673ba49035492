"""torchvision's and timm's blocks and nets with one op call as their forward.

Each class here derives from a stock class and adds no state. :func:`resnet_fast.accelerate` exchanges ``__class__``, so
children, parameters, hooks and ``state_dict`` stay untouched. A block reads its children's attributes at every call. If
they are not the plain layers that the op computes, it runs the stock forward and reports the reason.
"""
