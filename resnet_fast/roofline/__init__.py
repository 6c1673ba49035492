"""Turn problems into times: bytes per plan, floors on a device, predictions; the ceilings of this CPU."""
