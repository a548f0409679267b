"What everything stands on: configuration, environment, files, processes, MLflow runs."
