"""The exception tree, handed on from the ground floor. See `engines.errors` for the drawing."""

from engines.errors import BundleError, EngineError, InputError, ModelError, ParityError, SmoothRTError, reason

__all__ = ["BundleError", "EngineError", "InputError", "ModelError", "ParityError", "SmoothRTError", "reason"]
