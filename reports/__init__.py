"""Reports: tables and figures from MLflow runs and quoted results."""
