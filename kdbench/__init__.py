"""kdbench: knowledge distillation experiments from composable configs."""

__version__ = "0.1.0"
