import { once } from 'node:events';
import { createServer, type Server, type Socket } from 'node:net';
import { afterEach, describe, expect, it } from 'vitest';
import { askRas, rasAddress } from '../../src/comm/ras.js';

const servers: Server[] = [];
const sockets: Socket[] = [];
afterEach(() => {
  for (const socket of sockets.splice(0)) socket.destroy();
  for (const server of servers.splice(0)) server.close();
});

/** A RAS thread that answers its n-th connection as `answer` does; 0 counts the first. */
async function ras(answer: (socket: Socket, words: string, n: number) => void) {
  let n = 0;
  const server = createServer((socket) => {
    const own = n++;
    sockets.push(socket.on('error', () => {}));
    let words = '';
    socket.setEncoding('utf8').on('data', (piece: string) => {
      words += piece;
      if (words.endsWith('status\n')) answer(socket, words, own);
    });
  });
  servers.push(server.listen(0, '127.0.0.1'));
  await once(server, 'listening');
  return { host: '127.0.0.1', port: (server.address() as { port: number }).port };
}

async function timed<T>(promise: Promise<T>): Promise<[T, number]> {
  const start = performance.now();
  return [await promise, performance.now() - start];
}

describe('what RAS says', () => {
  it('is asked for in its plain words and handed on as soon as it is complete', async () => {
    let asked = '';
    const address = await ras((socket, words) => {
      asked = words;
      socket.write('OK\nNCCL version 2.29.2\n');
      setTimeout(() => socket.end('Warnings\n  rank 1 is MISMATCHED\n'), 50);
    });
    const [text, took] = await timed(askRas(address, 1000));
    expect(asked).toBe('timeout 0.5\nverbose status\n');
    expect(text).toBe('NCCL version 2.29.2\nWarnings\n  rank 1 is MISMATCHED');
    expect(took).toBeLessThan(500);
  });

  it('of an older one, which takes whole seconds only, comes all the same', async () => {
    const address = await ras((socket) => socket.end('ERROR: Invalid timeout value 0.5\nJob summary\n'));
    expect(await askRas(address, 1000)).toBe('Job summary');
  });

  it('comes from another rank when the one that got the connection is stopped', async () => {
    const address = await ras((socket, _, n) => {
      if (n > 0) socket.end('OK\nJob summary\n');
    });
    expect(await askRas(address, 1000)).toBe('Job summary');
  });

  it('is kept as far as it came when time is up', async () => {
    const address = await ras((socket) => void socket.write('OK\nJob summary\n'));
    const [text, took] = await timed(askRas(address, 300));
    expect(text).toBe('Job summary');
    expect(took).toBeLessThan(600);
  });

  it('is nothing where nobody listens or nobody answers, at once or when time is up', async () => {
    const address = await ras(() => {});
    const [silent, took] = await timed(askRas(address, 300));
    expect(silent).toBe(null);
    expect(took).toBeLessThan(600);
    servers.splice(0).forEach((server) => void server.close());
    for (const socket of sockets.splice(0)) socket.destroy();
    const [refused, tookThen] = await timed(askRas(address, 5000));
    expect(refused).toBe(null);
    expect(tookThen).toBeLessThan(500);
    expect(await askRas({ host: 'no-such-host.invalid', port: 1 }, 200)).toBe(null);
  });

  it('of a stranger on that port fills neither memory nor terminal', async () => {
    const address = await ras((socket) => {
      const flood = Buffer.alloc(1 << 20, 'x');
      flood.write('OK\n\x1b[2Jhello\x07\u202e\r\n');
      const more = () => void (socket.destroyed || socket.write(flood, more));
      more();
    });
    const text = (await askRas(address, 5000))!;
    expect(text.length).toBeLessThanOrEqual(1 << 16);
    expect(text.slice(0, 12)).toBe('[2Jhello\nxxx');
  });
});

describe('the address of RAS', () => {
  it.each([
    [{}, { host: 'localhost', port: 28028 }],
    [{ NCCL_RAS_ADDR: '10.0.0.1:5000' }, { host: '10.0.0.1', port: 5000 }],
    [{ NCCL_RAS_ADDR: '[::1]:5000' }, { host: '::1', port: 5000 }],
    [{ NCCL_RAS_ADDR: 'nonsense' }, null],
    [{ NCCL_RAS_ENABLE: '0' }, null],
  ])('of %j is %j', (env, address) => {
    expect(rasAddress(env)).toEqual(address);
  });
});
