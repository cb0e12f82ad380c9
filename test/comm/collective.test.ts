import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { chooseCollective } from '../../src/comm/collective.js';
import { localCollective } from '../../src/comm/local.js';
import { ZmqCollective } from '../../src/comm/zmq.js';
import { type Order, RankGroup } from '../helpers/rank-group.js';

/** Sizes in floats: empty, one, odd, either side of ZeroMQ's 8 KiB batches, what decoding uses, a large prefill. */
const SIZES = [0, 1, 2, 3, 7, 1021, 2044, 2045, 2049, 2816, 5632, 45_056, 500_001];

/** Small whole numbers: any sum of them is exact in fp32. */
function whole(length: number, rank: number): Float32Array {
  return Float32Array.from({ length }, (_, i) => ((i * 7 + rank * 13) % 1000) - 300);
}

/** Numbers of very different size, whose sum depends on the order. */
function wild(length: number, rank: number): Float32Array {
  let state = (rank + 1) * 2_654_435_761;
  return Float32Array.from({ length }, () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return (state / 2 ** 31 - 1) * 10 ** (state % 9);
  });
}

/** The balanced binary tree over ranks, in fp32, written down the plain way. */
function tree(parts: readonly Float32Array[]): Float32Array {
  if (parts.length === 1) return parts[0]!;
  const [left, right] = [tree(parts.slice(0, parts.length / 2)), tree(parts.slice(parts.length / 2))];
  return left.map((value, i) => Math.fround(value + right[i]!));
}

function countWrong(actual: Float32Array, expected: Float32Array): number {
  const [a, b] = [actual, expected].map((x) => new Uint32Array(x.buffer, x.byteOffset, x.length));
  return a!.length === b!.length ? a!.filter((bits, i) => bits !== b![i]).length : Number.NaN;
}

const CASES = [
  ['local', 1],
  ['zmq', 1],
  ['zmq', 2],
  ['zmq', 4],
  ['zmq', 8],
] as const;

describe.each(CASES)('the %s collective over %i processes', (name, ranks) => {
  let group: RankGroup;
  beforeAll(async () => {
    group = await RankGroup.start(name, ranks);
  });
  afterAll(() => group.stop());

  const each = (make: (rank: number) => Order): Order[] =>
    Array.from({ length: ranks }, (_, rank) => make(rank));
  const all = (length: number, values = whole) =>
    each((rank) => ({ op: 'allReduce', send: values(length, rank) }));

  it.each(SIZES)('sums %i floats without one wrong element', async (length) => {
    const orders = all(length);
    const expected = tree(orders.map((o) => o.send));
    for (const result of await group.run(orders)) expect(countWrong(result, expected)).toBe(0);
  });

  it('sums in the order of the balanced tree, with the same bits on every rank', async () => {
    const orders = all(4099, wild);
    const parts = orders.map((o) => o.send);
    const expected = tree(parts);
    for (const result of await group.run(orders)) expect(countWrong(result, expected)).toBe(0);
    if (ranks < 4) return;
    // the numbers are wild enough to tell: another order gives other bits
    const inRow = parts.reduce((sum, part) => sum.map((value, i) => Math.fround(value + part[i]!)));
    expect(countWrong(inRow, expected)).toBeGreaterThan(0);
  });

  it.each([0, 1, 3, 64, 2047, 33_333])(
    'gathers %i floats of each rank in the order of ranks',
    async (length) => {
      const orders = each((rank) => ({ op: 'gather', send: whole(length, rank) }));
      const expected = Float32Array.from(orders.flatMap((o) => [...o.send]));
      for (const result of await group.run(orders)) expect(countWrong(result, expected)).toBe(0);
    },
  );

  it('waits for a rank that comes a second later', async () => {
    const orders = all(100).map((o, rank) => ({ ...o, delayMs: rank === ranks - 1 ? 1000 : 0 }));
    const expected = tree(all(100).map((o) => o.send));
    for (const result of await group.run(orders)) expect(countWrong(result, expected)).toBe(0);
  });

  it('gives the same bits twice in a row', async () => {
    const [first, second] = [await group.run(all(2816, wild)), await group.run(all(2816, wild))];
    for (const rank of first.keys()) expect(countWrong(first[rank]!, second[rank]!)).toBe(0);
  });

  it('keeps infinities and NaN where they are', async () => {
    const odd = [Infinity, -Infinity, Number.NaN, -0];
    const results = await group.run(
      each((rank) => ({
        op: 'allReduce',
        send: Float32Array.from(odd.map((x, i) => (i === 3 || rank === 0 ? x : 1))),
      })),
    );
    for (const [inf, minus, nan, zero] of results) {
      expect([inf, minus]).toEqual([Infinity, -Infinity]);
      expect(nan).toBeNaN();
      expect(Object.is(zero, -0)).toBe(true);
    }
  });
});

describe('a collective of one rank', () => {
  it.each([
    ['local', () => localCollective()],
    ['zmq', () => ZmqCollective.bind(0, 1, () => '')],
  ])('numbers what it does: %s', async (_name, make) => {
    const collective = await make();
    expect(collective.next).toBe(1);
    await collective.allReduce(new Float32Array(1));
    await collective.gather(new Float32Array(1), new Float32Array(1));
    expect(collective.next).toBe(3);
    collective.close();
  });
});

describe('ranks that do not fit together', () => {
  const withGroup = (ranks: number, test: (group: RankGroup) => Promise<void>) => async () => {
    const group = await RankGroup.start('zmq', ranks);
    try {
      await test(group);
    } finally {
      await group.stop();
    }
  };
  const floats = (length: number): Order => ({ op: 'allReduce', send: new Float32Array(length) });

  it(
    'are told apart by the size of their buffers',
    withGroup(2, async (group) => {
      const [first, second] = await group.settle([floats(100), floats(101)]);
      expect(first!.error).toEqual({
        code: 'TP_COLLECTIVE_MISMATCH',
        text: 'ranks are out of step: rank 0 is at allReduce #1 of 400 bytes, rank 1 at allReduce #1 of 404 bytes',
      });
      expect(second!.error?.code).toBe('TP_COLLECTIVE_MISMATCH');
    }),
  );

  it(
    'are told apart by the operation',
    withGroup(2, async (group) => {
      const [first] = await group.settle([floats(8), { op: 'gather', send: new Float32Array(8) }]);
      expect(first!.error?.text).toContain(
        'rank 0 is at allReduce #1 of 32 bytes, rank 1 at gather #1 of 32 bytes',
      );
    }),
  );

  it(
    'name the partner that stays away',
    withGroup(4, async (group) => {
      const limited = { ...floats(8), limitMs: 300 };
      const [first, second, third] = await group.settle([limited, limited, limited, null]);
      expect(first!.error?.text).toBe('rank 0 waited 300 ms for rank 2 in allReduce #1');
      expect(second!.error?.text).toBe('rank 1 waited 300 ms for rank 3 in allReduce #1');
      expect(third!.error?.text).toBe('rank 2 waited 300 ms for rank 3 in allReduce #1');
    }),
  );
});

describe('the choice of a collective', () => {
  it('on CPU workers is zmq, and says why not the others', () => {
    expect(chooseCollective('auto', { ranks: 2, device: 'cpu', devices: [], hosts: 1 })).toEqual({
      name: 'zmq',
      why: 'zmq (peer off: no GPU; nccl off: no GPU)',
    });
  });

  it('for one rank is local', () => {
    expect(chooseCollective('auto', { ranks: 1, device: 'cpu', devices: [], hosts: 1 }).name).toBe('local');
    expect(chooseCollective('zmq', { ranks: 1, device: 'cpu', devices: [], hosts: 1 }).name).toBe('local');
  });

  it.each(['nccl', 'peer'] as const)('refuses %s without a GPU as bad input', (name) => {
    expect(() => chooseCollective(name, { ranks: 2, device: 'cpu', devices: [], hosts: 1 })).toThrow(
      expect.objectContaining({ code: 'TP_COLLECTIVE_UNSUPPORTED', exitCode: 2 }),
    );
  });

  it('leaves peer out where GPUs may not reach each other, and says why', () => {
    const two = { ranks: 2, device: 'cuda', devices: [0, 1], hosts: 1 } as const;
    const facts = { peers: [[1], [0]], peersOff: null, ncclWhy: null };
    expect(chooseCollective('auto', two, () => facts)).toEqual({ name: 'peer', why: 'peer' });
    const off = { ...facts, peersOff: 'switched off' };
    expect(chooseCollective('auto', two, () => off)).toEqual({
      name: 'nccl',
      why: 'nccl (peer off: switched off)',
    });
    expect(() => chooseCollective('peer', two, () => off)).toThrow('switched off');
    const none = { peers: [[], []], peersOff: null, ncclWhy: 'no library' };
    expect(chooseCollective('auto', two, () => none).why).toBe(
      'zmq (peer off: GPU 0 and 1 have no P2P access; nccl off: no library)',
    );
  });

  it('refuses a number of ranks that is no power of two', () => {
    expect(() => chooseCollective('auto', { ranks: 3, device: 'cpu', devices: [], hosts: 1 })).toThrow(
      '3 is no power of two',
    );
  });

  it('over several hosts is NCCL, where device numbers may repeat; on one host ranks that share a GPU have peer alone', () => {
    const gpus = () => ({ peers: [[1], [0]], peersOff: null, ncclWhy: null });
    const choose = (devices: number[], hosts: number) =>
      chooseCollective('auto', { ranks: devices.length, device: 'cuda', devices, hosts }, gpus);
    expect(choose([0, 0], 2)).toEqual({
      name: 'nccl',
      why: 'nccl (peer off: 2 hosts, and one collective joins all ranks)',
    });
    expect(choose([0, 1, 0, 1], 2).name).toBe('nccl');
    expect(choose([0, 0], 1).name).toBe('peer');
    expect(() =>
      chooseCollective('nccl', { ranks: 2, device: 'cuda', devices: [0, 0], hosts: 1 }, gpus),
    ).toThrow('ranks share a GPU');
    expect(() =>
      chooseCollective('peer', { ranks: 2, device: 'cuda', devices: [0, 0], hosts: 2 }, gpus),
    ).toThrow('2 hosts');
  });
});
