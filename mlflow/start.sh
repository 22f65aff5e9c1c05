#!/bin/sh
# Start MLflow's tracking server: PostgreSQL behind it, artifacts in a bucket that only it has the keys of.
#
#   MLFLOW_BACKEND_STORE_URI       postgresql+psycopg://USER:PASSWORD@HOST/DATABASE
#   MLFLOW_ARTIFACTS_DESTINATION   s3://BUCKET/PREFIX; with AWS_* and MLFLOW_S3_ENDPOINT_URL as any S3 client
#   MLFLOW_SERVER_ALLOWED_HOSTS    names it answers to, with ports: "mlflow:*,localhost:*" (the default: this machine's)
#   MLFLOW_AUTH                    off (default), or basic: then also
#       MLFLOW_AUTH_DATABASE_URI   where users are kept: another database of that PostgreSQL
#       MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_AUTH_ADMIN_PASSWORD, MLFLOW_FLASK_SERVER_SECRET_KEY
#   MLFLOW_HOST, MLFLOW_PORT       where it listens (default 0.0.0.0, 5000)
set -eu

need() {
    eval "value=\${$1:-}"
    [ -n "$value" ] || { echo "mlflow: $1 is not set; expected $2. Set it in the environment." >&2; exit 2; }
}

log_in() { # MLflow would tell it in a hundred lines
    python -c '
import os, sys, sqlalchemy
try:
    sqlalchemy.create_engine(os.environ[sys.argv[1]]).connect().close()
except Exception as exc:
    reason = " ".join(str(getattr(exc, "orig", None) or exc).split())
    print(f"mlflow: {sys.argv[1]}: {reason}; expected a database that lets us in. Correct it.", file=sys.stderr)
    sys.exit(2)
' "$1"
}

need MLFLOW_BACKEND_STORE_URI "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
need MLFLOW_ARTIFACTS_DESTINATION "s3://BUCKET/PREFIX"
: "${MLFLOW_SERVER_ALLOWED_HOSTS:=localhost:*,127.0.0.1:*}"
# Jobs are for judging language models: eight processes of 240 MB that nobody here asks.
: "${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:=false}"
export MLFLOW_SERVER_ALLOWED_HOSTS MLFLOW_SERVER_ENABLE_JOB_EXECUTION

# Addresses stay in the environment: an argument with a password could be read in the list of processes.
set -- mlflow server --host "${MLFLOW_HOST:-0.0.0.0}" --port "${MLFLOW_PORT:-5000}" --workers "${MLFLOW_WORKERS:-2}"
case "${MLFLOW_AUTH:-off}" in
off) ;;
basic)
    need MLFLOW_AUTH_DATABASE_URI "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
    need MLFLOW_AUTH_ADMIN_USERNAME "a name"
    need MLFLOW_AUTH_ADMIN_PASSWORD "a password of 12 characters or more"
    need MLFLOW_FLASK_SERVER_SECRET_KEY "a long random text, the same after each start"
    umask 077
    MLFLOW_AUTH_CONFIG_PATH=$(mktemp)
    export MLFLOW_AUTH_CONFIG_PATH
    {
        echo "[mlflow]"
        echo "default_permission = EDIT"
        echo "auth_cache_ttl_seconds = 60" # or each call of a client hashes the password again, on purpose slowly
        echo "authorization_function = mlflow.server.auth:authenticate_request_basic_auth"
        printf 'database_uri = %s\n' "$MLFLOW_AUTH_DATABASE_URI" | sed 's/%/%%/g'
    } >"$MLFLOW_AUTH_CONFIG_PATH"
    set -- "$@" --app-name basic-auth
    ;;
*) echo "mlflow: MLFLOW_AUTH is '$MLFLOW_AUTH'; expected off or basic. Correct it." >&2; exit 2 ;;
esac
log_in MLFLOW_BACKEND_STORE_URI
exec "$@"
