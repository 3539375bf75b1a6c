"""Make the pocket base pair: its captioned world, its networks and their training.

The only code of the project that trains base networks. Run it with
``python -m components.pretrain build-world | train | evaluate | export``.
"""
