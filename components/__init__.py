"""The steps of the product: ingest, train, register, evaluate, promote (and pretrain)."""
