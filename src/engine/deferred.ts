/** A promise and the ways to settle it (Promise.withResolvers, which Node 20 lacks). */
export class Deferred<T> {
  resolve!: (value: T) => void;
  readonly promise = new Promise<T>((resolve) => {
    this.resolve = resolve;
  });
}
