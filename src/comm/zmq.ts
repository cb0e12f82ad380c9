// The collective that works anywhere: host memory over ZeroMQ PAIR sockets, by recursive doubling.
// At level b a rank exchanges its running sum with rank ^ b and adds: a + b has the same bits on both sides, so every
// rank walks the same balanced binary tree and nobody has to hand the result back.

import { Pair } from 'zeromq';
import { fail, type TpError } from '../errors.js';
import { native } from '../native.js';
import type { Collective } from './collective.js';
import type { RankKeys } from './curve.js';
import { clientOptions, dismiss, type GuardedOptions, logRefusals, serverOptions } from './gatekeeper.js';
import { MAX_FRAME_BYTES } from './messages.js';

const OPS = ['allReduce', 'gather'] as const;
type Op = (typeof OPS)[number];

/** Before the payload: op, number of the operation, payload bytes; as little-endian u32. */
const HEADER_BYTES = 12;

/** From the beginning of an operation on, a core stays awake for so long; a longer wait has no use for it. */
const AWAKE_MS = 10;

export class ZmqCollective implements Collective {
  readonly name = 'zmq';
  readonly #rank: number;
  /** One per level of the tree: partners rank ^ 1, rank ^ 2, rank ^ 4. */
  readonly #links: readonly Link[];
  #sequence = 0;
  #op: Op = 'allReduce';
  #waiting: Link | null = null;
  #awake = false;

  private constructor(rank: number, links: readonly Link[]) {
    this.#rank = rank;
    this.#links = links;
  }

  /**
   * Binds this rank's ends; `endpoint(partner)` names them, `keys` encrypt them. `ranks` is a power of two. TP_BIND.
   */
  static async bind(
    rank: number,
    ranks: number,
    endpoint: (partner: number) => string,
    keys: RankKeys | null = null,
  ): Promise<ZmqCollective> {
    const links: Link[] = [];
    for (let bit = 1; bit < ranks; bit *= 2) links.push(await Link.open(rank, rank ^ bit, keys));
    for (const link of links) if (link.binds) await link.bind(endpoint(link.partner));
    return new ZmqCollective(rank, links);
  }

  /** The endpoints bound here, by the partner that shall connect to each. */
  get endpoints(): Record<string, string> {
    return Object.fromEntries(this.#links.filter((l) => l.binds).map((l) => [l.partner, l.endpoint]));
  }

  /** Connects to the endpoints that lower ranks have bound for this one, by rank. */
  connect(peers: Readonly<Record<string, string>>): void {
    for (const link of this.#links) if (!link.binds) link.connect(peers[link.partner]!);
  }

  get next(): number {
    return (this.#sequence + 1) >>> 0;
  }

  limit(timeoutMs: number): void {
    for (const link of this.#links) link.limit(timeoutMs);
  }

  /**
   * From now on a core of this rank stays awake during operations. A message passes through four threads, and on a virtual
   * machine most of its time goes into waking a halted core for each. For ranks with cores of their own.
   */
  keepAwake(): void {
    this.#awake = this.#links.length > 0;
  }

  async allReduce(buffer: Float32Array): Promise<void> {
    this.#begin('allReduce');
    for (const link of this.#links) {
      const theirs = await this.#exchange(link, buffer);
      for (let i = 0; i < buffer.length; i++) buffer[i]! += theirs[i]!;
    }
  }

  async gather(send: Float32Array, gathered: Float32Array): Promise<void> {
    const n = send.length;
    this.#begin('gather');
    gathered.set(send, this.#rank * n);
    for (const [level, link] of this.#links.entries()) {
      const block = 2 ** level; // ranks whose parts this one holds by now
      const first = (rank: number) => (rank - (rank % block)) * n;
      const mine = gathered.subarray(first(this.#rank), first(this.#rank) + block * n);
      gathered.set(await this.#exchange(link, mine), first(link.partner));
    }
  }

  pending(): { op: string; partner: number } | null {
    return this.#waiting && { op: `${this.#op} #${this.#sequence}`, partner: this.#waiting.partner };
  }

  close(): void {
    for (const link of this.#links) link.close();
  }

  #begin(op: Op): void {
    if (this.#awake) native().stayAwake(AWAKE_MS);
    this.#op = op;
    this.#sequence = this.next;
  }

  /** Sends `mine` and returns the partner's floats, as many; the view is valid until the next await. */
  async #exchange(link: Link, mine: Float32Array): Promise<Float32Array> {
    this.#waiting = link;
    const op = OPS.indexOf(this.#op);
    const bytes = await link.exchange(op, this.#sequence, mine).catch((error: unknown) => {
      throw this.#explain(error, link);
    });
    const same =
      bytes.length === HEADER_BYTES + mine.byteLength &&
      bytes.readUInt32LE(0) === op &&
      bytes.readUInt32LE(4) === this.#sequence;
    if (!same) throw this.#mismatch(link, bytes, mine.byteLength);
    this.#waiting = null;
    return floatsOf(bytes, mine.length);
  }

  #explain(error: unknown, link: Link): unknown {
    if ((error as { code?: unknown }).code !== 'EAGAIN') return error;
    return fail('TP_COLLECTIVE_TIMEOUT', this.#rank, this.pending()!.op, link.partner, link.timeoutMs);
  }

  #mismatch(link: Link, bytes: Buffer, expected: number): TpError {
    const said = (op: string, sequence: number, size: number) => `${op} #${sequence} of ${size} bytes`;
    const theirs =
      bytes.length < HEADER_BYTES
        ? `a message of ${bytes.length} bytes`
        : said(
            OPS[bytes.readUInt32LE(0)] ?? 'an unknown operation',
            bytes.readUInt32LE(4),
            bytes.readUInt32LE(8),
          );
    const ours = said(this.#op, this.#sequence, expected);
    return fail('TP_COLLECTIVE_MISMATCH', this.#rank, ours, link.partner, theirs);
  }
}

/** The socket to one partner. Of two partners the lower rank binds. */
class Link {
  readonly partner: number;
  readonly binds: boolean;
  endpoint = '';
  /** -1 = for ever, zeromq's default */
  timeoutMs = -1;
  readonly #socket: Pair;
  readonly #guarded: GuardedOptions | null;
  /**
   * zeromq reads a sent buffer later, on its own thread. Two outboxes in turn are enough: the partner's message n + 1
   * says that it has got our message n.
   */
  readonly #outboxes = [new ArrayBuffer(0), new ArrayBuffer(0)];
  #turn = 0;

  private constructor(rank: number, partner: number, guarded: GuardedOptions | null, options: object) {
    this.partner = partner;
    this.binds = rank < partner;
    this.#guarded = guarded;
    this.#socket = new Pair({ linger: 0, maxMessageSize: MAX_FRAME_BYTES, ...options });
  }

  /** Encrypted, it lets in its partner alone, or shows itself to it. */
  static async open(rank: number, partner: number, keys: RankKeys | null): Promise<Link> {
    const theirs = keys && keys.ranks[partner]!;
    if (rank < partner) {
      const guarded = await serverOptions(keys && { own: keys.own, clients: [theirs!] });
      return new Link(rank, partner, guarded, guarded);
    }
    return new Link(rank, partner, null, clientOptions(keys && { own: keys.own, server: theirs! }));
  }

  async bind(endpoint: string): Promise<void> {
    logRefusals(this.#socket, endpoint, `the link to rank ${this.partner}`);
    try {
      await this.#socket.bind(endpoint);
    } catch (error) {
      throw fail('TP_BIND', endpoint, (error as Error).message);
    }
    this.endpoint = this.#socket.lastEndpoint ?? endpoint;
  }

  connect(endpoint: string): void {
    this.#socket.connect(endpoint);
    this.endpoint = endpoint;
  }

  limit(timeoutMs: number): void {
    this.timeoutMs = timeoutMs;
    this.#socket.sendTimeout = timeoutMs;
    this.#socket.receiveTimeout = timeoutMs;
  }

  /** Swaps messages with the partner; rejects with EAGAIN after `timeoutMs`. */
  async exchange(op: number, sequence: number, payload: Float32Array): Promise<Buffer> {
    // one after the other: with both pending at once zeromq can miss the moment when a new partner makes room to send
    await this.#socket.send(this.#pack(op, sequence, payload));
    const [message] = await this.#socket.receive();
    return message!;
  }

  #pack(op: number, sequence: number, payload: Float32Array): Buffer {
    const length = HEADER_BYTES + payload.byteLength;
    this.#turn ^= 1;
    if (this.#outboxes[this.#turn]!.byteLength < length) this.#outboxes[this.#turn] = new ArrayBuffer(length);
    const outbox = this.#outboxes[this.#turn]!;
    const bytes = Buffer.from(outbox, 0, length);
    bytes.writeUInt32LE(op, 0);
    bytes.writeUInt32LE(sequence, 4);
    bytes.writeUInt32LE(payload.byteLength, 8);
    new Float32Array(outbox, HEADER_BYTES, payload.length).set(payload);
    return bytes;
  }

  close(): void {
    this.#socket.close();
    if (this.#guarded) dismiss(this.#guarded);
  }
}

/** The payload as floats; a small message may lie at an odd address, then it is copied. */
function floatsOf(message: Buffer, count: number): Float32Array {
  const offset = message.byteOffset + HEADER_BYTES;
  if (offset % 4 === 0) return new Float32Array(message.buffer, offset, count);
  const copy = new Uint8Array(count * 4);
  copy.set(message.subarray(HEADER_BYTES));
  return new Float32Array(copy.buffer);
}
