"""Training: packs of concepts under Ray Train and DeepSpeed (see `pack.train_pack`)."""
