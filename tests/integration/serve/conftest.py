from tests.unit.serve.fixtures import shelf, tiny_pair, tiny_student

__all__ = ["shelf", "tiny_pair", "tiny_student"]
