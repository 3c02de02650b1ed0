"""The model's anatomy: families, text, gates and skips, surgery, verified export. Knows no S3, MLflow or Kubeflow."""
