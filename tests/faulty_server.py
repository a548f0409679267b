"The server, with a model that dies, hangs or dawdles on request: `python faulty_server.py MODEL PORT`."
import os
import sys
import time
from pathlib import Path

import serving.server
from serving.worker import ProductAPI


class FaultyAPI(ProductAPI):
    "Misbehaves on some titles."
    def decode_request(self, request):
        title = request['designation']
        if title == 'die': os._exit(9)
        if title == 'die once' and not (mark := Path(os.environ['DIED_ONCE'])).exists(): mark.touch(); os._exit(9)
        if title == 'hang': time.sleep(3600)
        if title.startswith('dawdle'): time.sleep(float(title.split()[1]))
        if title == 'raise': raise KeyError('a mistake of ours')
        return super().decode_request(request)


if __name__ == '__main__':
    serving.server.ProductAPI = FaultyAPI
    serving.server.serve(sys.argv[1], port=int(sys.argv[2]))
