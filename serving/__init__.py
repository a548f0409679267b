"""The prediction API: LitServe in front of `rakuten_mm.predictor.Predictor`. Imports neither Lightning nor ZenML."""
