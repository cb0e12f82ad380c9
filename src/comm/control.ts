// The control channel: launcher = ROUTER, workers = DEALER.

import { Dealer, Router } from 'zeromq';
import { fail } from '../errors.js';
import { log, sparingly } from '../log.js';
import type { ClientKeys, ServerKeys } from './curve.js';
import { clientOptions, dismiss, type GuardedOptions, logRefusals, serverOptions } from './gatekeeper.js';
import {
  decodeLauncher,
  decodeWorker,
  encode,
  type LauncherMessage,
  MAX_FRAME_BYTES,
  type WorkerMessage,
} from './messages.js';
import { received, SendQueue } from './socket.js';

/** Messages on their way before the sender waits: a worker that runs ahead of the launcher is held back. */
const HIGH_WATER = 64;
/** Lines a second about messages that were refused. */
const MOST_REFUSALS = 10;
/** How long a closing socket may still deliver, in ms. */
const LINGER_MS = 200;

/** A worker's message and the raw frames that came with it. */
export interface FromWorker {
  rank: number;
  message: WorkerMessage;
  frames: Buffer[];
}

const nameOf = (rank: number): string => `rank-${rank}`;

/** The launcher's end. */
export class ControlServer {
  readonly endpoint: string;
  readonly #run: string;
  readonly #ranks: number;
  readonly #socket: Router;
  readonly #guarded: GuardedOptions;
  readonly #outgoing: SendQueue;
  /** A rank that talks nonsense must not fill the log. */
  readonly #refuse = sparingly((text) => log.warn(text), MOST_REFUSALS);

  private constructor(socket: Router, guarded: GuardedOptions, endpoint: string, run: string, ranks: number) {
    this.#socket = socket;
    this.#outgoing = new SendQueue(socket);
    this.#guarded = guarded;
    this.endpoint = endpoint;
    this.#run = run;
    this.#ranks = ranks;
  }

  /** Binds `endpoint` and keeps it; `keys` encrypt it and say who may connect. TP_BIND. */
  static async bind(
    endpoint: string,
    run: string,
    ranks: number,
    keys: ServerKeys | null = null,
  ): Promise<ControlServer> {
    const guarded = await serverOptions(keys);
    const socket = new Router({
      mandatory: true,
      linger: LINGER_MS,
      // the launcher says little and never waits: a rank that cannot be reached must not hold up the others
      sendTimeout: 0,
      sendHighWaterMark: 0,
      receiveHighWaterMark: HIGH_WATER,
      maxMessageSize: MAX_FRAME_BYTES,
      ...guarded,
    });
    logRefusals(socket, endpoint, 'ranks');
    try {
      await socket.bind(endpoint);
    } catch (error) {
      socket.close();
      dismiss(guarded);
      throw fail('TP_BIND', endpoint, (error as Error).message);
    }
    return new ControlServer(socket, guarded, socket.lastEndpoint ?? endpoint, run, ranks);
  }

  /** Hands over every valid message until `close`. A malformed one is logged and refused. */
  async *messages(): AsyncGenerator<FromWorker> {
    for await (const frames of received(this.#socket)) {
      const checked = this.#check(frames);
      if (checked instanceof Error) this.#refuse(checked.message);
      else yield checked;
    }
  }

  #check(parts: Buffer[]): FromWorker | Error {
    try {
      return this.#parse(parts);
    } catch (error) {
      return error as Error;
    }
  }

  #parse([identity, words, ...frames]: Buffer[]): FromWorker {
    const from = identity?.toString('latin1') ?? '';
    const rank = Number(/^rank-(\d{1,6})$/.exec(from)?.[1] ?? Number.NaN);
    if (!(rank < this.#ranks)) throw fail('TP_MESSAGE_BAD', JSON.stringify(from), 'no rank of this run');
    if (!words) throw fail('TP_MESSAGE_BAD', `rank ${rank}`, 'it is empty');
    const message = decodeWorker(this.#run, words, `rank ${rank}`);
    const expected = message.type === 'report' ? message.frames : 0;
    if (frames.length !== expected) {
      throw fail('TP_MESSAGE_BAD', `rank ${rank}`, `${frames.length} frames, ${expected} announced`);
    }
    if (message.type === 'hello' && message.rank !== rank) {
      throw fail('TP_MESSAGE_BAD', `rank ${rank}`, `it says hello as rank ${message.rank}`);
    }
    return { rank, message, frames };
  }

  /** Rejects when that worker is not connected. */
  send(rank: number, message: LauncherMessage): Promise<void> {
    return this.#outgoing.send([nameOf(rank), encode(this.#run, message)]);
  }

  close(): void {
    this.#socket.close();
    dismiss(this.#guarded);
  }
}

/** A worker's end. */
export class ControlClient {
  readonly #run: string;
  readonly #socket: Dealer;
  readonly #outgoing: SendQueue;

  constructor(endpoint: string, run: string, rank: number, keys: ClientKeys | null = null) {
    this.#run = run;
    this.#socket = new Dealer({
      routingId: nameOf(rank),
      linger: LINGER_MS,
      sendHighWaterMark: HIGH_WATER,
      receiveHighWaterMark: HIGH_WATER,
      maxMessageSize: MAX_FRAME_BYTES,
      ...clientOptions(keys),
    });
    this.#outgoing = new SendQueue(this.#socket);
    this.#socket.connect(endpoint);
  }

  /** Sends the words and, behind them, raw frames; resolves once queued. The frames must not change afterwards. */
  send(message: WorkerMessage, frames: readonly Uint8Array[] = []): Promise<void> {
    return this.#outgoing.send([encode(this.#run, message), ...frames.map(asBuffer)]);
  }

  /** The launcher's next message; TP_MESSAGE_BAD. */
  async receive(): Promise<LauncherMessage> {
    const [words] = await this.#socket.receive();
    return decodeLauncher(this.#run, words ?? Buffer.alloc(0));
  }

  /** What was sent is still delivered for a moment. */
  close(): void {
    this.#socket.close();
  }
}

/** zeromq takes Buffers without a copy; any other view would travel as its text. */
function asBuffer(view: Uint8Array): Buffer {
  return Buffer.from(view.buffer, view.byteOffset, view.byteLength);
}
