"""A whole distillation run: prepare, check, forecast, train each student, on one or several machines."""
