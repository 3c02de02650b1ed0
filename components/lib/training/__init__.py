"""The training loop, its objectives and its checkpoints. Imports neither S3, MLflow nor Kubeflow."""
