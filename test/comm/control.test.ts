import { statSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { Dealer } from 'zeromq';
import { Rendezvous } from '../../src/comm/bootstrap.js';
import { ControlClient, ControlServer, type FromWorker } from '../../src/comm/control.js';
import { tempDir } from '../helpers/tempdir.js';

const RUN = 'run-1';

let rendezvous: Rendezvous;
let server: ControlServer;
let heard: AsyncGenerator<FromWorker>;
const clients: { close(): void }[] = [];

beforeEach(async () => {
  rendezvous = new Rendezvous();
  server = await ControlServer.bind(rendezvous.control, RUN, 2);
  heard = server.messages();
});
afterEach(() => {
  for (const client of clients.splice(0)) client.close();
  server.close();
  rendezvous.remove();
  vi.restoreAllMocks();
});

const connect = (rank: number) => {
  const client = new ControlClient(server.endpoint, RUN, rank);
  clients.push(client);
  return client;
};
const next = async () => (await heard.next()).value as FromWorker;

describe('the control channel', () => {
  it('carries messages both ways, with raw frames behind the words', async () => {
    const client = connect(1);
    const frame = Float32Array.of(1, 2, 3);
    void client.send({ type: 'report', frames: 1, body: { step: 1 } }, [new Uint8Array(frame.buffer)]);
    const { rank, message, frames } = await next();
    expect([rank, message]).toMatchObject([1, { type: 'report', body: { step: 1 } }]);
    expect(frames[0]).toEqual(Buffer.from(frame.buffer));
    await server.send(1, { type: 'job', body: { kind: 'score' } });
    expect(await client.receive()).toMatchObject({ type: 'job', body: { kind: 'score' } });
  });

  it('keeps the order of messages that are sent without waiting', async () => {
    const client = connect(0);
    const sent = Array.from({ length: 500 }, (_, done) =>
      client.send({ type: 'progress', done, total: 500 }),
    );
    for (let i = 0; i < 500; i++) expect((await next()).message).toMatchObject({ done: i });
    await Promise.all(sent);
    const back = Array.from({ length: 100 }, (_, i) => server.send(0, { type: 'job', body: i }));
    for (let i = 0; i < 100; i++) expect(await client.receive()).toMatchObject({ body: i });
    await Promise.all(back);
  });

  it('holds a worker back that runs far ahead of the launcher', async () => {
    const client = connect(0);
    const frames = [new Uint8Array(1 << 20)];
    let queued = 0;
    for (let i = 0; i < 400; i++) {
      void client.send({ type: 'report', frames: 1, body: i }, frames).then(() => queued++);
    }
    await new Promise((resolve) => setTimeout(resolve, 300));
    expect(queued).toBeLessThan(400);
    for (let i = 0; i < 400; i++) await next();
  });

  it('rejects a message to a rank that is not there', async () => {
    await expect(server.send(1, { type: 'stop' })).rejects.toThrow();
  });

  it('reads on after any number of malformed messages', async () => {
    const warned = vi.spyOn(process.stderr, 'write').mockReturnValue(true);
    const stranger = new Dealer({ routingId: 'rank-1', linger: 0 });
    stranger.connect(server.endpoint);
    clients.push(stranger);
    const frames = fc.array(
      fc.uint8Array({ maxLength: 64 }).map((bytes) => Buffer.from(bytes)),
      {
        minLength: 1,
        maxLength: 4,
      },
    );
    let sent = 0;
    const good: FromWorker[] = [];
    void (async () => {
      for await (const message of heard) good.push(message);
    })();
    await fc.assert(
      fc.asyncProperty(frames, async (parts) => {
        sent++;
        await stranger.send(parts);
      }),
      { numRuns: 300 },
    );
    void connect(0).send({ type: 'stage', stage: 'addon' });
    await vi.waitFor(
      () => expect(good).toMatchObject([{ rank: 0, message: { type: 'stage', stage: 'addon' } }]),
      5000,
    );
    expect(warned).toHaveBeenCalled();
    expect(warned.mock.calls.length).toBeLessThan(sent); // they do not fill the log
  });

  it('lies in a folder that nobody else can enter, and that is taken away', () => {
    expect(statSync(rendezvous.dir).mode & 0o777).toBe(0o700);
    rendezvous.remove();
    expect(() => statSync(rendezvous.dir)).toThrow('ENOENT');
  });

  it('cannot be bound twice, nor under a path that is too long or not writable', async () => {
    await expect(ControlServer.bind('ipc:///no/such/folder/x', RUN, 1)).rejects.toThrow(
      'TP_BIND: cannot bind ipc:///no',
    );
    expect(() => new Rendezvous(join(tempDir(), 'x'.repeat(120)))).toThrow('longer than 107 bytes');
    expect(() => new Rendezvous('/proc')).toThrow('TP_BIND');
  });
});
