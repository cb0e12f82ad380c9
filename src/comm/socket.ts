// What a zeromq socket wants from its owner: one send and one receive at a time.

/** What a ROUTER or DEALER takes; frames in order. */
type Frames = (string | Buffer)[];

/** Sends one message after the other, in the order of the calls. */
export class SendQueue {
  readonly #socket: { send(frames: Frames): Promise<void> };
  #last: Promise<void> = Promise.resolve();

  constructor(socket: { send(frames: Frames): Promise<void> }) {
    this.#socket = socket;
  }

  /** Rejects as the socket does; the messages behind it are sent all the same. */
  send(frames: Frames): Promise<void> {
    const sent = this.#last.then(() => this.#socket.send(frames));
    this.#last = sent.catch(() => {});
    return sent;
  }
}

/** The frames of every message that comes, until the socket is closed. */
export async function* received(socket: {
  readonly closed: boolean;
  receive(): Promise<Buffer[]>;
}): AsyncGenerator<Buffer[]> {
  while (!socket.closed) {
    let frames: Buffer[];
    try {
      frames = await socket.receive();
    } catch (error) {
      if (socket.closed) return;
      throw error;
    }
    yield frames;
  }
}
