"The server, with a model that dies, hangs or dawdles on request: `python faulty_server.py MODEL PORT`."
import os
import sys
import time
from pathlib import Path

import serving.server
from serving.worker import ProductAPI


def ends_worker(version:str, at:str)->bool:
    "True if the file KILLERS says that this version does not survive being loaded, or its work."
    killers = os.environ.get('KILLERS')
    return bool(killers) and f'{version} {at}' in Path(killers).read_text().splitlines()


class FaultyAPI(ProductAPI):
    "Misbehaves on some titles, and with some versions."
    def open(self, bundle, version):
        if ends_worker(version, 'load'): os._exit(9)
        return super().open(bundle, version)

    def compare(self, x, out, side, send):
        if self.shadow and ends_worker(self.shadow.version, 'shadow'): send(('comparing', True)); os._exit(9)
        super().compare(x, out, side, send)

    def decode_request(self, request):
        title = request['designation']
        if ends_worker(self.version, 'work'): os._exit(9)
        if title == 'die': os._exit(9)
        if title == 'die once' and not (mark := Path(os.environ['DIED_ONCE'])).exists(): mark.touch(); os._exit(9)
        if title == 'hang': time.sleep(3600)
        if title.startswith('dawdle'): time.sleep(float(title.split()[1]))
        if title == 'raise': raise KeyError('a mistake of ours')
        return super().decode_request(request)


if __name__ == '__main__':
    serving.server.ProductAPI = FaultyAPI
    serving.server.serve(sys.argv[1], port=int(sys.argv[2]))
