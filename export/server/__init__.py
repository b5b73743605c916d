"""The OpenAI-compatible server: routes, admission, scheduler, engine, hot swap, metrics."""
