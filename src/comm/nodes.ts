// The channel between nodes: node 0 = ROUTER, the others = DEALER. It lives as long as the command, over any number of
// runs; each run has a control channel of its own.

import { Dealer, Router } from 'zeromq';
import { fail } from '../errors.js';
import { log, sparingly } from '../log.js';
import type { ClientKeys, ServerKeys } from './curve.js';
import { clientOptions, dismiss, type GuardedOptions, logRefusals, serverOptions } from './gatekeeper.js';
import { encode } from './messages.js';
import { decodeFollower, decodeLeader, type FollowerMessage, type LeaderMessage } from './node-messages.js';
import { received, SendQueue } from './socket.js';

/** Nodes say little: the longest message is an exit with the tail of a rank's stderr. */
const MAX_NODE_BYTES = 1 << 20;
const LINGER_MS = 500;
/** Lines a second about messages that were refused. */
const MOST_REFUSALS = 10;

const nameOf = (node: number): string => `node-${node}`;

export interface FromNode {
  node: number;
  message: FollowerMessage;
}

/** Node 0's end. */
export class NodeServer {
  readonly #session: string;
  readonly #nodes: number;
  readonly #socket: Router;
  readonly #guarded: GuardedOptions;
  readonly #outgoing: SendQueue;
  readonly #warn = sparingly((text) => log.warn(text), MOST_REFUSALS);

  private constructor(socket: Router, guarded: GuardedOptions, session: string, nodes: number) {
    this.#socket = socket;
    this.#outgoing = new SendQueue(socket);
    this.#guarded = guarded;
    this.#session = session;
    this.#nodes = nodes;
  }

  /** Binds `endpoint` and keeps it; TP_MASTER_BIND. */
  static async bind(
    endpoint: string,
    session: string,
    nodes: number,
    keys: ServerKeys | null,
  ): Promise<NodeServer> {
    const guarded = await serverOptions(keys);
    const socket = new Router({
      mandatory: true,
      // a node that was started again takes the place of the one that is gone
      handover: true,
      linger: LINGER_MS,
      sendTimeout: 0,
      maxMessageSize: MAX_NODE_BYTES,
      ...guarded,
    });
    logRefusals(socket, endpoint, 'nodes');
    try {
      await socket.bind(endpoint);
    } catch (error) {
      socket.close();
      dismiss(guarded);
      throw fail('TP_MASTER_BIND', endpoint, (error as Error).message);
    }
    return new NodeServer(socket, guarded, session, nodes);
  }

  /** Every valid message until `close`; others are logged and refused. */
  async *messages(): AsyncGenerator<FromNode> {
    for await (const frames of received(this.#socket)) {
      try {
        yield this.#parse(frames);
      } catch (error) {
        this.#warn((error as Error).message);
        const name = frames[0]?.toString('latin1') ?? '';
        // said to those who may hear it: a node of another version learns why it gets no welcome
        if (/^node-\d{1,6}$/.test(name)) this.#refuse(name, (error as Error).message);
      }
    }
  }

  #parse([identity, words, ...more]: Buffer[]): FromNode {
    const from = identity?.toString('latin1') ?? '';
    const node = Number(/^node-(\d{1,6})$/.exec(from)?.[1] ?? Number.NaN);
    if (!(node > 0 && node < this.#nodes)) {
      throw fail('TP_MESSAGE_BAD', JSON.stringify(from), `no node of this run: it has ${this.#nodes}`);
    }
    if (!words || more.length) throw fail('TP_MESSAGE_BAD', `node ${node}`, `${more.length + 1} frames`);
    const { run, ...message } = decodeFollower(words, `node ${node}`);
    if (message.type === 'hello' && message.node !== node) {
      throw fail('TP_MESSAGE_BAD', `node ${node}`, `it says hello as node ${message.node}`);
    }
    if (message.type !== 'hello' && run !== this.#session) {
      throw fail('TP_MESSAGE_BAD', `node ${node}`, `it belongs to run ${run}, not to ${this.#session}`);
    }
    return { node, message };
  }

  /** Rejects when that node is not connected. */
  send(node: number, message: LeaderMessage): Promise<void> {
    return this.#send(nameOf(node), message);
  }

  #refuse(name: string, why: string): void {
    this.#send(name, { type: 'refused', why }).catch(() => {});
  }

  #send(name: string, message: LeaderMessage): Promise<void> {
    return this.#outgoing.send([name, encode(this.#session, message)]);
  }

  close(): void {
    this.#socket.close();
    dismiss(this.#guarded);
  }
}

/** Another node's end. */
export class NodeClient {
  readonly #socket: Dealer;
  readonly #outgoing: SendQueue;
  #session = '';
  /** Connections that node 0 has closed before a handshake was done. */
  refusals = 0;

  /** `onGone` is called when an open connection closes: node 0's process has ended, or its host has. */
  constructor(endpoint: string, node: number, keys: ClientKeys | null, onGone: () => void) {
    this.#socket = new Dealer({
      routingId: nameOf(node),
      linger: LINGER_MS,
      // what is said to a leader that is not there yet must reach the first one alone
      immediate: true,
      reconnectInterval: 100,
      reconnectMaxInterval: 1000,
      maxMessageSize: MAX_NODE_BYTES,
      ...clientOptions(keys),
    });
    this.#outgoing = new SendQueue(this.#socket);
    let open = false;
    this.#socket.events.on('handshake', () => {
      open = true;
    });
    const closed = () => {
      if (open) onGone();
      else this.refusals++;
      open = false;
    };
    this.#socket.events.on('disconnect', closed);
    for (const kind of ['protocol', 'auth', 'other'] as const)
      this.#socket.events.on(`handshake:error:${kind}`, () => this.refusals++);
    this.#socket.connect(endpoint);
  }

  send(message: FollowerMessage): Promise<void> {
    return this.#outgoing.send([encode(this.#session, message)]);
  }

  /** Node 0's next message; a malformed one is TP_MESSAGE_BAD or TP_PROTOCOL. */
  async receive(): Promise<LeaderMessage> {
    for (;;) {
      const [words] = await this.#socket.receive();
      const { run, ...message } = decodeLeader(words ?? Buffer.alloc(0));
      // a node that is refused says that it leaves, too
      if (message.type === 'welcome' || message.type === 'refused') this.#session = run;
      // another session's words, such as those of a leader that was started again
      if (run === this.#session) return message;
    }
  }

  close(): void {
    this.#socket.close();
  }
}
