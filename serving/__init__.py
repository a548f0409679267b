"""The prediction API: LitServe in front of `rakuten_mm.models.predictor.Predictor`. Imports neither Lightning nor ZenML."""
