"""Training files of other tools: what each of their keys becomes here, with the defaults that the tool has."""

__all__ = ["llama_factory_data", "training_file"]
