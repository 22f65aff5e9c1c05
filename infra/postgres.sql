-- Beside `mlflow`, which the image makes: the users of MLflow, and Prefect. Run once, when the volume is empty.
CREATE DATABASE mlflow_users;
CREATE DATABASE prefect;
