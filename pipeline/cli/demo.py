"""`echodistill demo`."""


def demo():
    pass
