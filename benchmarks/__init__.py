"""Measurements, one file a question: `python -m benchmarks.NAME --help`. `benchmarks.figures` writes results into the
README."""
from rakuten_mm.core.environment import load_environment

load_environment('no.env')  # telemetry and hubs are off before anything large is imported
