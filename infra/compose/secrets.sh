#!/bin/sh
# Makes the secrets of compose.yaml, once: what is there stays. Run again after removing one to rotate it.
set -eu
# The folder is closed to other users of the machine. The files are not: containers run under users of their
# own, and see the files alone.
umask 022
folder=$(dirname "$0")/secrets
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"

random() { head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'; }

for name in s3_password postgres_password ray_token grafana_password; do
    [ -s "$name" ] || random > "$name"
done
[ -s s3_credentials ] || printf '[default]\naws_access_key_id = echodistill\naws_secret_access_key = %s\n' \
    "$(cat s3_password)" > s3_credentials
# The endpoint keeps digests alone; `python -m serve.auth NAME >> api_keys` adds a key for somebody.
if [ ! -s scrape_key ]; then
    random > scrape_key
    printf 'prometheus sha256:%s\n' "$(printf %s "$(cat scrape_key)" | sha256sum | cut -d' ' -f1)" >> api_keys
fi
