"""A config as one flat dictionary, for comparing two of them."""


def flat(node, prefix=""):
    """{"MODEL.BACKBONE.NAME": ..., ...}"""
    values = {}
    for key, value in node.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values
