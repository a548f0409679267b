"""A client that loads a server, in a process of its own: aiohttp on uvloop, with requests that were encoded beforehand.

Of every request it keeps when it was due, sent and answered (monotonic seconds), the status (0 if the connection
broke) and the model's version, if that is wanted.
"""
import asyncio
import gc
import itertools
import math
import pickle
import random
import re
import statistics
import time
from contextlib import suppress
from pathlib import Path

import aiohttp
import uvloop

COLUMNS = ['due', 'sent', 'ended', 'status', 'version']
LINKS = 512 # Connections of an open loop


class Client:
    "Asks, and keeps when what was answered."
    def __init__(self, http:aiohttp.ClientSession, url:str, bodies:str, start:int = 0, versions:bool = False):
        self.http,self.url,self.bodies = http, url, pickle.loads(Path(bodies).read_bytes())
        self.first,self.versions,self.records = start, versions, []
        self.old,self.changed = '', math.inf  # the version that answered first, and when another one did

    async def ask(self, i:int, due:float, keep:bool = True)->tuple:
        "Send request number `i`, and record it."
        sent,status,body = time.monotonic(), 0, b''
        with suppress(aiohttp.ClientError, OSError):
            async with self.http.post(self.url, data=self.bodies[(self.first+i)%len(self.bodies)]) as r:
                body = await r.read(); status = r.status
        found = re.search(rb'"model_version":"([^"]*)"', body) if self.versions else None
        record = (due, sent, time.monotonic(), status, found[1].decode() if found else '')
        self.old = self.old or record[4]
        if record[4] not in ('', self.old): self.changed = min(self.changed, record[2])
        if keep: self.records.append(record)
        return record

    async def closed(self, clients:int, warm_s:float = 0, seconds:float = 600, count:int|None = None,
                     settle_s:float = math.inf)->dict:
        """So many ask again as soon as they are answered, for `seconds` after `warm_s`, or until `count` were asked,
        or until `settle_s` after a version other than the first answered."""
        numbers,begin = itertools.count() if count is None else iter(range(count)), time.monotonic()+warm_s
        async def one():
            for i in numbers:
                now = time.monotonic()
                if now > min(begin+seconds, self.changed+settle_s): break
                if not (await self.ask(i, now))[3]: await asyncio.sleep(.01)
        asking = [asyncio.create_task(one()) for _ in range(clients)]
        await asyncio.sleep(warm_s); cpu,at = time.process_time(), time.monotonic()
        await asyncio.wait(asking, timeout=seconds)
        out = dict(begin=at, wall_s=time.monotonic()-at, cpu_s=time.process_time()-cpu)
        await asyncio.gather(*asking)
        return out

    async def open(self, rate:float, seconds:float, seed:int, drop:bool = False, start:float = 0)->dict:
        "Requests arrive at random, `rate` a second, whatever becomes of others; `drop` those not sent by the end."
        rng,links,tasks,unsent,cpu = random.Random(seed), asyncio.Semaphore(LINKS), set(), 0, time.process_time()
        due = begin = start or time.monotonic()
        async def one(i:int, due:float):
            nonlocal unsent
            async with links:
                if drop and time.monotonic() > begin+seconds: unsent += 1
                else: await self.ask(i, due)
        for i in itertools.count():
            due += rng.expovariate(rate)
            if due > begin+seconds: break
            await asyncio.sleep(max(due-time.monotonic(), 0))
            tasks.add(t := asyncio.create_task(one(i, due))); t.add_done_callback(tasks.discard)
        out = dict(end=begin+seconds, wall_s=time.monotonic()-begin, cpu_s=time.process_time()-cpu)
        await asyncio.gather(*tasks)
        return out | dict(unsent=unsent, arrived=i)

    async def burst(self, rate:float, seconds:float, seed:int, give_up_s:float = 30)->dict:
        "An open loop with a single request, asked one by one, before and after it."
        async def single():
            _,sent,ended,status,_ = await self.ask(0, time.monotonic(), keep=False)
            return ended, ended-sent, status
        usual = statistics.median([(await single())[1] for _ in range(25)][5:])
        start = time.monotonic()+.1; end = start+seconds
        loop = asyncio.create_task(self.open(rate, seconds, seed, drop=True, start=start))
        await asyncio.sleep(end-time.monotonic())
        fine = []
        while len(fine) < 3 and time.monotonic() < end+give_up_s:
            ended,took,status = await single()
            fine = [*fine, ended] if status == 200 and took <= 1.5*usual else []
            await asyncio.sleep(.01)
        return await loop | dict(usual_ms=1e3*usual, recovery_s=fine[0]-end if len(fine) == 3 else None)


def run(how:str, load:dict, auth:dict, limit_s:float = 300, **client)->dict:
    "Load a server by a method of `Client`; says when it begins."
    gc.collect(); gc.disable()
    print('started', flush=True)
    async def go():
        connector,timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        headers = auth | {'Content-Type': 'application/json'}
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as http:
            me = Client(http, **client)
            return await asyncio.wait_for(getattr(me, how)(**load), limit_s) | dict(records=me.records)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner: return runner.run(go())
