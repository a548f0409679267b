#!/usr/bin/env bash
# Back up the system of deploy/compose.yaml, and put it back; scripts/backup.py does the same for one without Docker.
#   scripts/backup.sh save FOLDER       a new folder; the system may go on
#   scripts/backup.sh restore FOLDER    into empty volumes, with the passwords of before in .env; nothing but PostgreSQL may be up
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 2 ] || { sed -n '2,4s/^# *//p' "$0" >&2; exit 1; }
umask 077
project=$(docker compose config | sed -n 's/^name: //p')
files() { docker compose run --rm -T --no-deps --volume "${project}_mlflow:/app/mlflow" scheduler python scripts/backup.py "$1" - --mlflow /app/mlflow; }
answers() { docker compose exec -T postgres sh -c "PGPASSWORD=\$POSTGRES_PASSWORD exec $*"; }
case $1 in
save)
    mkdir "$2"
    answers pg_dump --host=127.0.0.1 --username=rakuten --format=custom --no-owner rakuten > "$2/answers.dump"
    files save > "$2/files.tar"
    cp .env "$2/.env"
    ;;
restore)
    docker compose up --detach --wait postgres
    files restore < "$2/files.tar"
    answers pg_restore --host=127.0.0.1 --username=rakuten --dbname=rakuten --no-owner --single-transaction --exit-on-error < "$2/answers.dump"
    ;;
*) exec "$0" ;;
esac
echo "$1d: $2" >&2
