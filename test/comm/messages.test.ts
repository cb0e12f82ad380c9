import fc from 'fast-check';
import { pack } from 'msgpackr';
import { describe, expect, it } from 'vitest';
import {
  decodeLauncher,
  decodeWorker,
  encode,
  type LauncherMessage,
  PROTOCOL,
  STAGES,
  type WorkerMessage,
} from '../../src/comm/messages.js';
import { TpError } from '../../src/errors.js';

const RUN = 'run-1';

const count = fc.nat();
const stage = fc.constantFrom(...STAGES);
// through JSON: msgpack writes whole numbers as integers, so -0 arrives as 0
const body = fc
  .jsonValue({ maxDepth: 3 })
  .map((value) => JSON.stringify(value))
  .filter((json) => !json.includes('"__proto__"')) // travels under another name, see below
  .map((json) => JSON.parse(json));
const endpoints = fc.dictionary(count.map(String), fc.string());

const collectives = fc.array(
  fc.record({
    place: count,
    n: fc.option(count),
    op: fc.string(),
    layer: fc.integer(),
    stage: fc.string(),
    bytes: count,
    agoMs: count,
    tookMs: fc.option(count),
  }),
  { maxLength: 3 },
);

const worker: fc.Arbitrary<WorkerMessage> = fc.oneof(
  fc.record({
    type: fc.constant('hello' as const),
    rank: count,
    pid: count,
    host: fc.string(),
    version: fc.string(),
    endpoints,
  }),
  fc.record({ type: fc.constant('stage' as const), stage }),
  fc.record({ type: fc.constant('progress' as const), done: fc.maxSafeNat(), total: fc.maxSafeNat() }),
  fc.record({ type: fc.constant('ready' as const), body }),
  fc.record({ type: fc.constant('report' as const), frames: fc.nat(4096), body }),
  fc.record({ type: fc.constant('result' as const), body }),
  fc.record({
    type: fc.constant('at' as const),
    doing: fc.string(),
    waitsFor: fc.option(count),
    collectives,
    asyncError: fc.string(),
  }),
  fc.record({
    type: fc.constant('error' as const),
    code: fc.string(),
    text: fc.string(),
    exitCode: count,
    stage,
    step: fc.integer(),
    collectives,
    asyncError: fc.string(),
  }),
);
const launcher: fc.Arbitrary<LauncherMessage> = fc.oneof(
  fc.record({ type: fc.constant('setup' as const), peers: endpoints, body }),
  fc.record({ type: fc.constant('job' as const), body }),
  fc.record({ type: fc.constant('where' as const) }),
  fc.record({ type: fc.constant('stop' as const) }),
);

/** The code of the error that `run` throws; anything else than a TpError fails the test. */
function codeOf(run: () => unknown): string | null {
  try {
    run();
    return null;
  } catch (error) {
    if (error instanceof TpError) return error.code;
    throw error;
  }
}

describe('messages', () => {
  it('say the same after the journey, worker to launcher', () => {
    fc.assert(
      fc.property(worker, (message) => {
        expect(decodeWorker(RUN, encode(RUN, message), 'rank 0')).toEqual({
          v: PROTOCOL,
          run: RUN,
          ...message,
        });
      }),
    );
  });

  it('say the same after the journey, launcher to worker', () => {
    fc.assert(
      fc.property(launcher, (message) => {
        expect(decodeLauncher(RUN, encode(RUN, message))).toEqual({ v: PROTOCOL, run: RUN, ...message });
      }),
    );
  });

  it('carry a key that would be a prototype under another name', () => {
    const message: LauncherMessage = { type: 'job', body: JSON.parse('{"__proto__":{"polluted":true}}') };
    const { body } = decodeLauncher(RUN, encode(RUN, message)) as { body: object };
    expect(Object.keys(body)).toEqual(['__proto_']);
    expect('polluted' in body || 'polluted' in {}).toBe(false);
  });

  it('are refused with a coded error when the bytes are garbage', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 300 }), (bytes) => {
        expect(['TP_MESSAGE_BAD', 'TP_PROTOCOL']).toContain(codeOf(() => decodeWorker(RUN, bytes, 'rank 0')));
        expect(['TP_MESSAGE_BAD', 'TP_PROTOCOL']).toContain(codeOf(() => decodeLauncher(RUN, bytes)));
      }),
      { numRuns: 2000 },
    );
  });

  it('never crash the reader when one byte of a good message is changed or its end is cut off', () => {
    fc.assert(
      fc.property(
        worker,
        fc.nat(),
        fc.integer({ min: 1, max: 255 }),
        fc.boolean(),
        (message, at, flip, cut) => {
          const bytes = Buffer.from(encode(RUN, message));
          const place = at % bytes.length;
          bytes[place]! ^= flip;
          const code = codeOf(() => decodeWorker(RUN, cut ? bytes.subarray(0, place) : bytes, 'rank 0'));
          expect([null, 'TP_MESSAGE_BAD', 'TP_PROTOCOL']).toContain(code);
          if (cut) expect(code).not.toBeNull();
        },
      ),
      { numRuns: 2000 },
    );
  });

  it.each([
    ['a regular expression', Buffer.from([0xc7, 3, 0x78, 0x92, 0xa0, 0xa0])],
    ['undefined', Buffer.from([0xd4, 0, 0])],
    ['a Set', Buffer.from([0xc7, 2, 0x73, 0x91, 1])],
    ['a typed array', Buffer.from([0xc7, 5, 0x74, 7, 0, 0, 0, 0])],
    ['a Date', Buffer.from([0xd6, 0xff, 0, 0, 0, 1])],
    ['a record', Buffer.from([0xd4, 0x72, 0x40, 0x91, 0xa1, 0x61, 5])],
    ['a record with a two-byte id', Buffer.from([0xd5, 0x72, 0x40, 1, 0x91, 0xa1, 0x61, 5])],
    ['a big integer', Buffer.from([0xc7, 1, 0x42, 1])],
  ])('refuse %s as a body: extensions are off', (_, value) => {
    const good = pack({ v: PROTOCOL, run: RUN, type: 'result', body: null });
    const bytes = Buffer.concat([good.subarray(0, good.length - 1), value]);
    expect(good.at(-1)).toBe(0xc0); // the body, null, stands last
    expect(codeOf(() => decodeWorker(RUN, bytes, 'rank 0'))).toBe('TP_MESSAGE_BAD');
  });

  it('survive nesting as deep as the stack', () => {
    expect(codeOf(() => decodeWorker(RUN, Buffer.alloc(300_000, 0x91), 'rank 0'))).toBe('TP_MESSAGE_BAD');
  });

  it('refuse an array that announces more elements than there are bytes', () => {
    const bytes = Buffer.from([0xdd, 0xff, 0xff, 0xff, 0xff, 1]);
    expect(codeOf(() => decodeWorker(RUN, bytes, 'rank 0'))).toBe('TP_MESSAGE_BAD');
  });

  it('name both versions when a worker speaks another protocol', () => {
    const bytes = pack({ v: 99, run: RUN, type: 'stop' });
    expect(() => decodeWorker(RUN, bytes, 'rank 3')).toThrow(
      `TP_PROTOCOL: rank 3 speaks protocol 99, this process ${PROTOCOL}`,
    );
  });

  it('of another run are refused', () => {
    const bytes = encode('another', { type: 'stop' });
    expect(() => decodeLauncher(RUN, bytes)).toThrow('it belongs to run another, not to run-1');
  });

  it('with a key that nobody knows are refused', () => {
    const bytes = pack({ v: PROTOCOL, run: RUN, type: 'stop', extra: 1 });
    expect(codeOf(() => decodeLauncher(RUN, bytes))).toBe('TP_MESSAGE_BAD');
  });

  it('from a worker are not taken for the launcher’s', () => {
    const bytes = encode(RUN, { type: 'stage', stage: 'ready' });
    expect(codeOf(() => decodeLauncher(RUN, bytes))).toBe('TP_MESSAGE_BAD');
  });
});
