"""A whole distillation run: prepare, check, forecast, and train each student, on one or several machines."""
