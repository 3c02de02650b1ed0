"""The one training loop, its objectives and its checkpoints. Knows no S3, MLflow or Kubeflow."""
