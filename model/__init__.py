"""The method: EchoDistill's mathematics over frozen base networks.

Nothing here knows of clusters, storage, tracking or HTTP. Functions take modules, tensors and
`torch.Generator`s and return losses, tensors and metrics; optimizers and collectives belong to
`components/train`.
"""

METHOD_VERSION = 2
"""Raised by hand whenever the mathematics changes; part of every concept's digest."""
