"""What the stages know of a model: families, text, gates and skips, surgery, verified export. Knows no S3, MLflow or Kubeflow."""
