import { describe, expect, it } from 'vitest';
import { decodeWorker, encode } from '../../src/comm/messages.js';
import type { StepReport } from '../../src/engine/job.js';
import { packReport, parseJob, parseSetup, unpackReport } from '../../src/engine/wire.js';

const REPORT: StepReport = {
  step: 3,
  kind: 'prefill',
  tokens: [{ sequence: 0, position: 2 }],
  rows: [{ sequence: 0, position: 2, token: -1, logprob: 0, targetLogprob: -Infinity, finish: null }],
  time: { computeMs: 0.25, syncMs: 0, hostMs: 1e-3 },
  readBytes: 2 ** 40 + 1,
  expertsRead: 12,
  logits: Float32Array.of(1.5, -0, Number.NaN),
  trace: [
    { stage: 'qkv', layer: 0, parts: 2, sharded: true, hashes: BigUint64Array.of(1n, 2n ** 64n - 1n) },
    { stage: 'route', layer: -1, parts: 1, sharded: false, hashes: BigUint64Array.of(7n) },
  ],
  times: {
    begin: 1e15,
    end: 1e15 + 9,
    spans: Float64Array.of(1, 2, 3, Number.NaN, Number.NaN, Number.NaN),
    bytes: Float64Array.of(2 ** 40, 0),
    blocks: Int32Array.of(0, 131),
    marks: Float64Array.from({ length: 12 }, (_, i) => i),
  },
};

/** A report as it comes out at the other end; every frame at an odd address, as a socket may hand it over. */
function travel(report: StepReport): StepReport {
  const { body, frames } = packReport(report);
  const words = encode('run', { type: 'report', frames: frames.length, body });
  const heard = decodeWorker('run', words, 'rank 0') as { body: unknown };
  const shifted = frames.map((frame) => {
    const bytes = new Uint8Array(frame.length + 1);
    bytes.set(frame, 1);
    return bytes.subarray(1);
  });
  return unpackReport(heard.body, shifted, 0);
}

describe('a report', () => {
  it('arrives with the same words, logits and hashes', () => {
    expect(travel(REPORT)).toEqual(REPORT);
  });

  it.each([
    ['logits', { logits: null }],
    ['trace', { trace: null }],
    ['times', { times: null }],
    ['logits and trace', { logits: null, trace: null }],
    ['anything large', { logits: null, trace: null, times: null }],
  ])('arrives without %s', (_, change) => {
    expect(travel({ ...REPORT, ...change })).toEqual({ ...REPORT, ...change });
  });

  it('takes the logits from the middle of a larger buffer', () => {
    const logits = Float32Array.of(9, 1, 2, 9).subarray(1, 3);
    expect([...travel({ ...REPORT, logits }).logits!]).toEqual([1, 2]);
  });

  it('with a frame too few, too many or of an odd length is refused', () => {
    const { body, frames } = packReport(REPORT);
    const [logits, hashes, times] = frames as [Uint8Array, Uint8Array, Uint8Array];
    expect(() => unpackReport(body, [logits], 1)).toThrow('rank 1 refused: report with 1 frames, not 3');
    expect(() => unpackReport(body, [logits, hashes, times, times], 1)).toThrow('4 frames, not 3');
    expect(() => unpackReport(body, [logits.subarray(1), hashes, times], 1)).toThrow(
      '11 bytes, no multiple of 4',
    );
    expect(() => unpackReport(body, [logits, hashes.subarray(8), times], 1)).toThrow('2 trace hashes, not 3');
    expect(() => unpackReport(body, [logits, hashes, times.subarray(8)], 1)).toThrow('19 times, not 20');
  });

  it('with a field missing or unknown is refused by name', () => {
    const { body, frames } = packReport(REPORT);
    expect(() => unpackReport({ ...(body as object), step: -1 }, frames, 0)).toThrow('step');
    expect(() => unpackReport({ ...(body as object), extra: 1 }, frames, 0)).toThrow('TP_MESSAGE_BAD');
    expect(() => unpackReport(null, [], 0)).toThrow('TP_MESSAGE_BAD');
  });
});

describe('a job and a setup', () => {
  it('that are none are refused', () => {
    expect(() => parseJob({ kind: 'reboot' })).toThrow('TP_MESSAGE_BAD');
    expect(() => parseSetup({ spec: {}, collective: 'zmq' })).toThrow('TP_MESSAGE_BAD');
  });

  it('keep a fault that is meant for every rank', () => {
    const fault = { rank: -1, sequence: 0, stage: 'down', layer: 3, position: 5 };
    const job = { kind: 'score', sequences: [], keepLogits: true, fault };
    expect(parseJob(job)).toEqual(job);
  });
});
