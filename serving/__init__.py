"The prediction API: LitServe in front of `rakuten_mm.models.predictor`. Imports neither Lightning nor ZenML."
