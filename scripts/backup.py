"""Back up what cannot be made again, and put it back: dataset, runs and models, answers and corrections, settings.

    python scripts/backup.py save FOLDER       # new; the system may go on
    python scripts/backup.py restore FOLDER    # into an empty place; nothing may run

--home is the folder with .env, data/ and artifacts/ (the checkout). FOLDER gets files.tar, which ends with the sha256
of its files, and answers.dump of PostgreSQL if API_DATABASE_URL names one (pg_dump and pg_restore are needed then).
Instead of FOLDER, `-` writes or reads files.tar alone. scripts/backup.sh does it for Docker.
"""
import argparse
import hashlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values

# Of artifacts/; trainings, graphs and logs can be made again. mlflow.db and mlruns are where no MLflow server is used.
KEPT = ('feedback.db', 'served', 'scheduler/runs.sqlite', 'mlflow.db', 'mlruns')
SUMS,LITE = 'SHA256.json', b'SQLite format 3\0'


def places(home:Path, mlflow:Path)->dict[str, Path]:
    "What is backed up, by its name in the archive."
    artifacts = home/'artifacts'
    return {'.env': home/'.env', 'data': home/'data'/'catalogue', 'mlflow': mlflow} | {
        f'artifacts/{n}': artifacts/n for n in KEPT}


def is_sqlite(path:Path)->bool:
    with path.open('rb') as f: return f.read(len(LITE)) == LITE


def snapshot(db:Path, to:Path):
    "A copy of a SQLite database at one moment, by its own means; ends the program if it is damaged."
    with closing(sqlite3.connect(f'{db.resolve().as_uri()}?mode=ro', uri=True)) as source, \
            closing(sqlite3.connect(to)) as copy:
        try:
            source.backup(copy)
            copy.execute('pragma journal_mode=delete')
            said = copy.execute('pragma quick_check').fetchone()[0]
        except sqlite3.Error as e: said = e
    if said != 'ok': sys.exit(f'{db}: {said}')


def files(found:dict[str, Path])->Iterator[tuple[str, Path]]:
    "Files by their names in the archive: databases first, because they name other files and not the other way round."
    every = [(name if top.is_file() else f'{name}/{p.relative_to(top)}', p) for name,top in found.items()
             for p in ([top] if top.is_file() else sorted(top.rglob('*'))) if p.is_file() and not p.is_symlink()]
    lite = {p for _,p in every if is_sqlite(p)}
    beside = {p.with_name(p.name+end) for p in lite for end in ('-wal', '-shm', '-journal')}
    yield from sorted(((n, p) for n,p in every if p not in beside), key=lambda np: np[1] not in lite)


class Hashed:
    "A file that hashes what is read of it."
    def __init__(self, file:BinaryIO): self.file,self.sha256 = file, hashlib.sha256()

    def read(self, n:int=-1)->bytes:
        data = self.file.read(n)
        self.sha256.update(data)
        return data


def write(out:BinaryIO, found:dict[str, Path]):
    "A tar of all files, the sums last."
    sums = {}
    with tarfile.open(fileobj=out, mode='w|') as tar, tempfile.TemporaryDirectory() as scratch:
        for name,path in files(found):
            if lite := is_sqlite(path):
                snapshot(path, Path(scratch, 'db')); path = Path(scratch, 'db')
            try: info,file = tar.gettarinfo(path, name), path.open('rb')
            except FileNotFoundError: continue  # removed since: an answer that was erased
            info.mode,info.uid,info.gid,info.uname,info.gname = 0o600 if lite else info.mode, 0, 0, '', ''
            with file:
                hashed = Hashed(file)
                tar.addfile(info, hashed)
            sums[name] = hashed.sha256.hexdigest()
            if lite: path.unlink()
        text = json.dumps(sums, indent=0).encode()
        last = tarfile.TarInfo(SUMS)
        last.size = len(text)
        tar.addfile(last, io.BytesIO(text))


def read(archive:BinaryIO, found:dict[str, Path]):
    "Put the files of a tar in their places, which must be empty; ends the program if they are not what was saved."
    if full := [str(p) for p in found.values() if p.is_file() or (p.is_dir() and any(p.iterdir()))]:
        sys.exit(f"not empty: {', '.join(full)}; restore into an empty place")
    sums,told = {}, None
    with tarfile.open(fileobj=archive, mode='r|') as tar:
        for info in tar:
            body = tar.extractfile(info)
            if info.name == SUMS: told = json.loads(body.read()); continue
            top = next((n for n in found if info.name == n or info.name.startswith(f'{n}/')), None)
            if top is None or '..' in Path(info.name).parts: sys.exit(f'{info.name!r} is in no backup')
            path = found[top]/info.name.removeprefix(top).lstrip('/')
            path.parent.mkdir(parents=True, exist_ok=True)
            hashed = Hashed(body)
            with path.open('xb') as f:
                while data := hashed.read(2**20): f.write(data)
            path.chmod(info.mode & 0o777); os.utime(path, (info.mtime, info.mtime))
            sums[info.name] = hashed.sha256.hexdigest()
    if sums != told: sys.exit('the backup is not whole, or was changed: what was restored of it is not to be used')


def postgres(url:str, program:str, *args:str):
    "Run a program of PostgreSQL for a database, whose password no command line shows."
    at = urlsplit(url)
    env = {'PGHOST': at.hostname, 'PGPORT': str(at.port or 5432), 'PGUSER': at.username, 'PGPASSWORD': at.password,
           'PGDATABASE': at.path.lstrip('/')}
    os.umask(0o077)
    done = subprocess.run([program, *args], env=os.environ | {k: unquote(v) for k,v in env.items() if v})
    if done.returncode: sys.exit(f'{program} ended with {done.returncode}')


def main():
    "Parse and do it."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['save', 'restore'])
    parser.add_argument('folder')
    parser.add_argument('--home', type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument('--mlflow', type=Path, help='folder of the MLflow server (HOME/artifacts/mlflow)')
    args = parser.parse_args()
    found,folder = places(args.home, args.mlflow or args.home/'artifacts'/'mlflow'), Path(args.folder)
    if args.folder == '-':
        return write(sys.stdout.buffer, found) if args.what == 'save' else read(sys.stdin.buffer, found)
    url = lambda: os.environ.get('API_DATABASE_URL') or dotenv_values(args.home/'.env').get('API_DATABASE_URL') or ''
    dump = folder/'answers.dump'
    if args.what == 'save':
        folder.mkdir(parents=True, mode=0o700)
        if url().startswith('postgresql'):
            postgres(url(), 'pg_dump', '--format=custom', '--no-owner', '--file', str(dump))
        with (folder/'files.tar').open('xb') as f: write(f, found)
    else:
        with (folder/'files.tar').open('rb') as f: read(f, found)
        if dump.exists() and not url().startswith('postgresql'):
            sys.exit(f'{dump} is of a PostgreSQL: name an empty one in API_DATABASE_URL, and restore again')
        if dump.exists(): postgres(url(), 'pg_restore', '--no-owner', '--single-transaction', '--exit-on-error',
                                   '--dbname', urlsplit(url()).path.lstrip('/'), str(dump))
    return print(f"{args.what}d: {folder}")


if __name__ == '__main__':
    try: main()
    except (OSError, tarfile.TarError) as e: sys.exit(str(e))
