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

look() { # what MLflow would tell in a hundred lines, or only when somebody asks for an artifact
    python -c '
import os, socket, sys


def refuse(where, exc, expected):
    reason = " ".join(str(getattr(exc, "orig", None) or exc).split())
    print(f"mlflow: {where}: {reason}; expected {expected}. Correct it.", file=sys.stderr)
    sys.exit(2)


def log_in(name):
    import sqlalchemy

    engine = sqlalchemy.create_engine(os.environ[name])
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":  # 6 MB that go with the connection: is there room?
            connection.exec_driver_sql("CREATE TEMPORARY TABLE room AS SELECT md5(i::text) FROM generate_series(1, 100000) i")


def ask_bucket(address):
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    once = Config(connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 1})
    try:
        client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None, config=once)
        client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
    except ClientError as exc:
        if exc.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403, 404):  # else it is away, and comes back
            refuse("MLFLOW_ARTIFACTS_DESTINATION", exc, "a bucket that lets us in")
    except NoCredentialsError as exc:
        refuse("AWS_ACCESS_KEY_ID", exc, "keys of the bucket")
    except BotoCoreError:
        pass


for name in sys.argv[1:]:
    try:
        log_in(name)
    except Exception as exc:
        if getattr(getattr(exc, "orig", None), "sqlstate", None) != "42501":  # it may make no table of that kind
            refuse(name, exc, "a database that lets us in, with room")
if os.environ["MLFLOW_ARTIFACTS_DESTINATION"].startswith("s3://"):
    ask_bucket(os.environ["MLFLOW_ARTIFACTS_DESTINATION"])
try:
    host, port = os.environ["MLFLOW_HOST"], int(os.environ["MLFLOW_PORT"])
    socket.create_server((host, port)).close()
except (OSError, ValueError, OverflowError) as exc:
    refuse("MLFLOW_HOST, MLFLOW_PORT", exc, "an address of ours with a free port")
' "$@"
}

need MLFLOW_BACKEND_STORE_URI "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
need MLFLOW_ARTIFACTS_DESTINATION "s3://BUCKET/PREFIX"
: "${MLFLOW_SERVER_ALLOWED_HOSTS:=localhost:*,127.0.0.1:*}"
# Jobs are for judging language models: eight processes of 240 MB that nobody here asks.
: "${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:=false}"
: "${MLFLOW_HOST:=0.0.0.0}" "${MLFLOW_PORT:=5000}"
export MLFLOW_SERVER_ALLOWED_HOSTS MLFLOW_SERVER_ENABLE_JOB_EXECUTION MLFLOW_HOST MLFLOW_PORT

# Addresses stay in the environment: an argument with a password could be read in the list of processes.
set -- mlflow server --host "$MLFLOW_HOST" --port "$MLFLOW_PORT" --workers "${MLFLOW_WORKERS:-2}"
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
look MLFLOW_BACKEND_STORE_URI ${MLFLOW_AUTH_CONFIG_PATH:+MLFLOW_AUTH_DATABASE_URI}
exec "$@"
